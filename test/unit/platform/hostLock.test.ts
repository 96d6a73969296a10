import { spawn } from "node:child_process"
import { once } from "node:events"
import { existsSync, mkdirSync, readdirSync, statSync, symlinkSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, identity } from "effect"
import * as HostLock from "../../../src/platform/HostLock.ts"
import { temporaryDirectory } from "../../fixtures.ts"

const lockIn = (dir: string) => {
  const file = path.join(dir, "a.lock")
  return { file, lock: HostLock.withLock(file, identity) }
}

/** Another process that holds the lock until its stdin ends or it is killed. */
const otherHolder = (file: string) =>
  Effect.promise(async () => {
    const child = spawn("flock", ["--exclusive", "--no-fork", file, "sh", "-c", "echo held; cat"], {
      stdio: ["pipe", "pipe", "inherit"]
    })
    await once(child.stdout, "data")
    return child
  })

const openFiles = () => readdirSync("/proc/self/fd").length

describe("host lock", () => {
  it.live("holders exclude each other, and a waiter is woken by the end of the one before", () => {
    const { file, lock } = lockIn(temporaryDirectory())
    let inside = 0
    let most = 0
    let runs = 0
    const one = lock(
      Effect.gen(function* () {
        inside += 1
        runs += 1
        most = Math.max(most, inside)
        yield* Effect.yieldNow()
        yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
        inside -= 1
      })
    )
    return Effect.gen(function* () {
      yield* Effect.replicateEffect(one, 10, { concurrency: "unbounded" })
      assert.deepStrictEqual({ inside, most, runs }, { inside: 0, most: 1, runs: 10 })
      assert.isFalse(existsSync(file), "the lock file stays behind")
    })
  })

  it.live("is free again after a failure, a defect and an interruption", () => {
    const { lock } = lockIn(temporaryDirectory())
    return Effect.gen(function* () {
      assert.deepStrictEqual(yield* Effect.exit(lock(Effect.fail("no"))), Exit.fail("no"))
      assert.isTrue(Exit.isFailure(yield* Effect.exit(lock(Effect.die("never")))))
      assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.timeout(lock(Effect.never), "50 millis"))))
      assert.strictEqual(yield* lock(Effect.succeed(1)), 1)
    })
  })

  it.live("callers that are interrupted while they take it leave it free, and no file open", () => {
    const { lock } = lockIn(temporaryDirectory())
    const before = openFiles()
    return Effect.gen(function* () {
      for (let i = 0; i < 60; i++) {
        const fiber = yield* Effect.fork(lock(Effect.never))
        // at every moment of taking it: at once, after some turns of the loop, and when flock(1) may have it
        for (let turns = i % 20; turns > 0; turns--) yield* Effect.promise(() => new Promise((go) => setImmediate(go)))
        yield* Fiber.interrupt(fiber)
      }
      assert.strictEqual(yield* Effect.timeout(lock(Effect.succeed("free")), "10 seconds"), "free")
      assert.isAtMost(openFiles(), before)
    })
  })

  it.live("a waiter can be interrupted, and the holder keeps it", () => {
    const { lock } = lockIn(temporaryDirectory())
    return Effect.gen(function* () {
      const held = yield* Deferred.make<void>()
      const release = yield* Deferred.make<void>()
      const holder = yield* Effect.fork(
        lock(Effect.zipRight(Deferred.succeed(held, undefined), Deferred.await(release)))
      )
      yield* Deferred.await(held)
      assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.timeout(lock(Effect.void), "100 millis"))))
      yield* Deferred.succeed(release, undefined)
      yield* Fiber.join(holder)
      yield* lock(Effect.void)
    })
  })

  it.live("processes exclude each other, and one that is killed holds nothing", () => {
    const { file, lock } = lockIn(temporaryDirectory())
    return Effect.gen(function* () {
      const other = yield* otherHolder(file)
      assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.timeout(lock(Effect.void), "200 millis"))))
      const waiting = yield* Effect.fork(lock(Effect.succeed("mine")))
      other.kill("SIGKILL")
      // its own child has the descriptor too, and ends with its stdin
      other.stdin.end()
      assert.strictEqual(yield* Effect.timeout(Fiber.join(waiting), "10 seconds"), "mine")
    })
  })

  it.live("the lock file is the user's alone", () => {
    const { file, lock } = lockIn(temporaryDirectory())
    return lock(Effect.sync(() => assert.strictEqual(statSync(file).mode & 0o777, 0o600)))
  })

  it.live("a file that cannot be opened is the caller's failure, not a wait without end", () => {
    const dir = temporaryDirectory()
    writeFileSync(path.join(dir, "file"), "")
    mkdirSync(path.join(dir, "is-a-directory"))
    symlinkSync(path.join(dir, "elsewhere"), path.join(dir, "link"))
    return Effect.gen(function* () {
      for (const name of ["file/below", "is-a-directory", "link"]) {
        const lock = HostLock.withLock(path.join(dir, name), ({ message }) => message)
        const error = yield* Effect.flip(lock(Effect.void))
        assert.include(error, name)
      }
      assert.isFalse(existsSync(path.join(dir, "elsewhere")))
    })
  })
})
