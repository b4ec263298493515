"""What others would have written for the same job, as well as a competent person would write it."""
