"""What Python programs use: training in this process, trained models, and a scikit-learn estimator."""
