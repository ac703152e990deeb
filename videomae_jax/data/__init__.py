"""Files to uint8 batches with NumPy, Grain and PyAV. No JAX here: workers must never open a device."""
