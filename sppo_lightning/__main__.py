"""`python -m sppo_lightning`."""

import warnings

from sppo_lightning.cli import main

if __name__ == "__main__":
    # models stay in eval mode on purpose: without dropout the update's log-probabilities are the sampler's
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # which changes no batch (`resuming.py`)
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
    main()
