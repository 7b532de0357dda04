"""m3: an open system behind a clinical language model. Models, quantisation, serving and training over m3kernels."""
