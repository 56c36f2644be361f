"""`python -m vlmtune`, which is what `accelerate launch -m vlmtune` runs."""

from vlmtune.cli import main

if __name__ == "__main__":
    main()
