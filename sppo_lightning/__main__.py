"""`python -m sppo_lightning`."""

from sppo_lightning.cli import main

if __name__ == "__main__":
    main()
