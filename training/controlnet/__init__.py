"""The ControlNet that learns faces and bodies: people data set, training, export, evaluation."""
