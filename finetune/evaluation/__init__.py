"""What a trained model is measured with."""
