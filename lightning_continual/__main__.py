"""``python -m lightning_continual``, by which processes of one run are started anew."""

from lightning_continual.cli import main

if __name__ == "__main__":
    main()
