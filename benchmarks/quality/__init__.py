"""The leaderboard: log loss and seconds of this project and its peers, on tables of many kinds."""
