"""What drives a fit behind the watch: batches and steps, validations, log windows."""
