"""From a Hugging Face checkpoint or a preset to tensors on a device, and the decoder that runs on them."""
