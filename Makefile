.DEFAULT_GOAL := help
.PHONY: help demo demo-fleet install packages generate test architecture sim chaos check check-long bench bench-adapter format lint \
	clippy breaks-found words commits servers matrix licences long-tests long-matrix breaks short-bench

# The steps of `check`, and what `check-long` adds.
CHECK := format clippy breaks-found words commits licences test matrix
LONG := long-tests long-matrix sim breaks short-bench

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: servers ## two throw-away servers, a replication, a crash in the middle, a comparison (20 s)
	@echo "compiling the service and the demo; the first time this takes some minutes"
	cargo build --locked --bin stream-replicator --example demo
	@cargo run --locked --quiet --example demo

demo-fleet: servers ## nodes of two sites, adapters, sampled replications and advisories, all counts compared (1 min): ARGS="--nodes n"
	@echo "compiling the service and the demo; the first time this takes some minutes"
	contrib/fleet-demo/start $(ARGS)

test: servers ## all tests, on real nats-servers
	contrib/run-tests --workspace -- --test-threads 8

architecture: ## the rules of ARCHITECTURE.md, read from the sources: imports, purity, sockets, lengths, names
	cargo test --locked --test architecture

sim: ## the copy core in simulation: 10,000 seeds, SEEDS=n of them, or SEED=n alone
	SEEDS=$(or $(SEEDS),10000) cargo test --locked --test sim -- --nocapture

chaos: servers ## three instances between two clusters while everything fails: SECONDS=n of it (120), a SEED=n again
	CHAOS_SECONDS=$(or $(SECONDS),120) SEED=$(SEED) cargo test --locked --test it -- --ignored --nocapture long_storm

check: ## what has to pass before a merge: format, clippy, texts, commits, licences, tests, server versions
	@contrib/steps $(CHECK)

check-long: ## check, the long tests and a short bench
	@contrib/steps $(CHECK) $(LONG)

bench: servers ## speed, CPU and memory beside a native source and a stop-and-wait copier
	cargo bench --locked --bench copy -- $(ARGS)

bench-adapter: servers ## Choria's data adapter: rate, an outage of the target, memory, CPU, latency
	cargo bench --locked --bench adapter -- $(ARGS)

install: ## the program, its man page, completions and unit below PREFIX (/usr/local), its options below /etc
	contrib/install

packages: ## a Debian package and an RPM, from `package.metadata` of Cargo.toml
	contrib/packages

generate: ## what is made from the code: schemas/ and docs/configuration.md
	GENERATE=1 cargo test --locked --quiet --test it ::current_

format:
	cargo fmt --all --check

lint: clippy breaks-found words commits

clippy:
	cargo clippy --locked --workspace --all-targets -- -D warnings

# Whether the places of all breaks are found, without breaking anything.
breaks-found:
	contrib/break-on-purpose --check

words:
	contrib/check-words

commits:
	contrib/check-commits

long-tests: servers
	contrib/run-tests --workspace -- --ignored

long-matrix: servers
	MATRIX=all contrib/version-matrix

breaks: servers
	contrib/break-on-purpose

short-bench: servers
	cargo bench --locked --bench copy -- --quick

# Where nothing can be downloaded, a server of your own will do for most tests.
servers:
	@contrib/fetch-nats-server --all >/dev/null || test -n "$$NATS_SERVER"

matrix: servers ## the tests that speak to both servers, on other server versions
	contrib/version-matrix

licences:
	contrib/check-licences
	contrib/check-advisories
