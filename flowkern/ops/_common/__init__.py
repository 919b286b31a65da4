"""What every op shares: choosing a backend, native kernels, argument checks, noise."""
