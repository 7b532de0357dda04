"""``python -m m3`` is ``m3``."""

from m3.cli import app

if __name__ == "__main__":
    app()
