"""From how much quantisation noise on a layer keeps its precision. Data; torch-free, for plans to state it."""

# dB that each number format must leave of Gaussian data; a layer below its floor is not quantised. "w8a8" is int8's,
# of weights alone as of products.
FLOORS = {"w8a8": 35.0, "fp8": 27.0, "nf4": 20.0}
