"""`python -m catpo`, also under `accelerate launch -m catpo`."""

from catpo.cli.main import main

if __name__ == "__main__":
    main()
