"""Data to train and evaluate the reference networks on."""
