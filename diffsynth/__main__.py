"""`python -m diffsynth` is `fastvmt`; so is `torchrun --nproc-per-node N -m diffsynth`, on N ranks."""

from diffsynth.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
