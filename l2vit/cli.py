"""What every program's entry point shares: exit statuses and one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable

from l2vit import console
from l2vit.errors import UserError


def run(main: Callable[[], int | None], *, program: str, report: bool = True) -> int:
    """Call ``main`` and turn its outcome into an exit status.

    0 on success (or the status ``main`` returns), 2 for a configuration error, 1 for any other
    error a user can mend. Unexpected exceptions keep their traceback: they are ours to fix.

    Args:
        main: the program's body.
        program: the name errors are printed under, such as ``data_prep build``.
        report: print the error; ranks other than 0 pass False for errors all ranks share.
    """
    try:
        return main() or 0
    except UserError as error:
        if report:
            line = " ".join(str(error).split())
            console.tell(f"{program}: error: {line}", error=True)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        console.mute(sys.stdout)
        return 1
    finally:
        console.flush()
