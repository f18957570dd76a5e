"""What a step is made of: the meaning of every op in plain PyTorch, its Triton twins, and the choice between them."""
