"""What prepare_data.py, train_accelerate.py and eval_hellaswag.py share. Imports the model, never a script."""
