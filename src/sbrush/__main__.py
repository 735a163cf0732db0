"""python -m sbrush, so that `accelerate launch -m sbrush distill ...` works."""

from sbrush.cli.app import main

if __name__ == "__main__":
    main()
