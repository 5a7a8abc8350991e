"""What a run will need and how long it will take, worked out before anything is paid for."""
