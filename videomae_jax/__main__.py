"""`python -m videomae_jax COMMAND`."""

from videomae_jax import cli

if __name__ == "__main__":
    cli.entry()
