"""What the scripts share. Imports the model, never a script. docs/how-it-works.md says where a change belongs."""
