"""A convolution under global pooling, in closed form."""
