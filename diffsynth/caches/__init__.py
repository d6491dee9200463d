"""Step caches: denoising steps that reuse the work of an earlier one."""
