"""Many runs at the same time: the jobs of experiments, and the GPUs of each job."""
