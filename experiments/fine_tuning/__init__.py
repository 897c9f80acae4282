"""What a memory recalls that is added to a trained model: the case of this project's users."""
