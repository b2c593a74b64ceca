"""What makes batches out of examples, and examples out of batches. Depends on `batch/` alone, and patches no model."""
