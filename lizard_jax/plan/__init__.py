"""What a run will take of machines that are not here, before anything is paid for: ``train.py --plan``."""
