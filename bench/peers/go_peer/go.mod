module agentsse/bench/peer

go 1.19
