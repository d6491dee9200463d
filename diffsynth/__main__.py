"""`fastvmt`, also as `python -m diffsynth`, and `torchrun --nproc-per-node N -m diffsynth`, on N ranks."""

import sys


def start() -> int:
    """Run the command. Ctrl-C during the imports prints one line instead of a traceback."""
    try:
        from diffsynth.cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("fastvmt: interrupted\n")
        return 130


if __name__ == "__main__":
    raise SystemExit(start())
