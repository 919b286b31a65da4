"""What every op shares: choosing a backend, loading the native kernels, checking arguments, noise."""
