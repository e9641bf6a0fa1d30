// The worker process of Graphile Worker: node graphile.cjs URL CAPACITY PATH OPTIONS
// It speaks the protocol of `work` in benchmarks/child.py, or creates the tables with URL --prepare.
"use strict";

const fs = require("node:fs");
const readline = require("node:readline");
const { Logger, run, runMigrations } = require("graphile-worker");

const [connectionString, capacity, path, words] = process.argv.slice(2);
const logger = new Logger(() => () => {});

// The configuration of https://worker.graphile.org/docs/performance
const preset = {
  worker: {
    connectionString,
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0,
    logger,
  },
};

const monotonic = () => Number(process.hrtime.bigint()) / 1e9; // the clock of Python's time.monotonic()
const say = (found) => process.stdout.write(JSON.stringify(found) + "\n");

function main() {
  const numbers = new BigInt64Array(Number(capacity));
  const started = new Float64Array(Number(capacity));
  const took = new Float64Array(Number(capacity));
  const { seconds = 0, concurrency } = JSON.parse(words);
  let count = 0;
  let began = 0;
  let running;

  async function bench(payload) {
    const slot = count++;
    started[slot] = monotonic();
    numbers[slot] = BigInt(payload.n);
    if (seconds) {
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      took[slot] = monotonic() - started[slot];
    }
  }

  function write() {
    const columns = [numbers, started, took].map((column) => Buffer.from(column.buffer, 0, 8 * count));
    fs.writeFileSync(path, Buffer.concat(columns));
    say({ count });
  }

  const respond = {
    go() {
      began = monotonic();
      const concurrentJobs = seconds && concurrency ? concurrency : preset.worker.concurrentJobs;
      const worker = { ...preset.worker, concurrentJobs };
      running = run({ preset: { worker }, taskList: { bench }, noHandleSignals: true });
    },
    count() {
      say({ count, now: monotonic() });
    },
    report() {
      const { user, system } = process.cpuUsage();
      const memory = process.memoryUsage().rss / 2 ** 20;
      say({ count, now: monotonic(), began, cpu: (user + system) / 1e6, memory });
    },
    async stop() {
      await (await running).stop();
      write();
      process.exit(0);
    },
    leave() {
      write();
      process.exit(0);
    },
  };

  readline.createInterface({ input: process.stdin }).on("line", (line) => respond[line]()).on("close", () => process.exit(1));
  say({ ready: true });
}

if (capacity === "--prepare") {
  runMigrations({ preset });
} else {
  main();
}
