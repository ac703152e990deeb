"""`python -m videomae_jax COMMAND`."""

import time

STARTED = time.time()  # before anything heavy is imported: the run's seconds count from here

if __name__ == "__main__":
    from videomae_jax import cli

    cli.entry(STARTED)
