"""The LightningModule: the training loop, one optimizer per local module, what happens to non-finite steps."""
