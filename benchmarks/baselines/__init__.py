"""What the operator is measured against."""
