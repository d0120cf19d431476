"""How every command line of this package starts and how it fails."""
import os
import sys

from absl import app, flags, logging


def run(main):
    """Runs main(argv) under absl. A user's mistake ends in one line on stderr and exit status 1.

    Mistakes are what our code raises as ValueError or OSError (a missing file, an empty prompt, a wrong setting);
    anything else is a defect and keeps its stack trace. GVU_TRACEBACK=1 shows the stack for those too.
    """
    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)        # libraries are talkative; ours prints what it has to say
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            if os.environ.get("GVU_TRACEBACK"):
                raise
            sys.exit(f"error: {' '.join(str(error).split())}")

    app.run(guarded, flags_parser=parse)
