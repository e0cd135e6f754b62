"""Entry points for `ray job submit`: thin shells of Ray Data, Ray Train and Ray tasks around `cllm`."""
