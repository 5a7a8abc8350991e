"""Starting, watching and checking the ranks of a run."""
