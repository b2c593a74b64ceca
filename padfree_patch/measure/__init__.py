"""What is measured before, during and after training: padding, a step's time, memory; and the texts to measure on."""
