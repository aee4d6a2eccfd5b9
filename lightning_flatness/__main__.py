"""`python -m lightning_flatness` runs the demo."""

from lightning_flatness.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
