"""Models, local training and server optimisers."""
