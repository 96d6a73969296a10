/**
 * `npm run test:fresh [-- SUITE] [--build]`: set-up, checks and a real guest on a Debian that has nothing but a minimal system, git and
 * what set-up installs. It finds the program that happened to be on our machines and that set-up does not install.
 *
 * The root is made by mmdebstrap in a file system in memory, in mount and process namespaces of its own: with the last process of these
 * all that was made is gone, however this one ends. Node, Rust and Go are this machine's, read-only. Kept between runs, in the cache
 * directory: what npm, cargo, go and apt download, and what they compile. The kernel and the Debian base are taken from this user's asset
 * store where it has them for these sources; with --build everything is built.
 */
import { spawn, spawnSync } from "node:child_process"
import {
  appendFileSync,
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync
} from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { debianReleases } from "../src/host/hostRequirements.ts"

const checkout = path.resolve(import.meta.dirname, "..")
const args = process.argv.slice(2)
const suite = args.find((arg) => !arg.startsWith("-")) ?? "bookworm"
const buildsAll = args.includes("--build")

/** The root, and what is written into it; a directory that every Debian has and leaves empty. */
const root = "/mnt"
const home = "/home/fresh"
const sources = "/srv/machinen"
const user = { uid: 1000, home: "/home/somebody" }
const store =
  process.env["MACHINEN_ASSETS_STORE"] ??
  path.join(process.env["MACHINEN_HOME"] ?? path.join(os.homedir(), ".machinen"), "assets")
const cache = path.join(
  process.env["MACHINEN_CACHE_DIR"] ?? path.join(os.homedir(), ".cache", "machinen"),
  "fresh-root"
)
const MiB = 1024 ** 2
const memoryNeeded = 8 * 1024 * MiB

const say = (text: string) => process.stdout.write(`${text}\n`)
const inside = (file: string) => path.join(root, file)

const results: Array<boolean> = []
const finish = (): never => {
  const failed = results.filter((ok) => !ok).length
  say(`fresh root ${suite}: ${results.length - failed} passed, ${failed} failed`)
  process.exit(failed === 0 ? 0 : 1)
}

class Refused extends Error {}

/** Starts this program again in namespaces of its own; they end when it does, also by `kill -9`: the pipe on stdin closes then. */
const isolate = () => {
  const free = Number(/^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"))?.[1]) * 1024
  if (!(suite in debianReleases)) refuse(`there is no suite ${suite}: ${Object.keys(debianReleases).join(", ")}`)
  if (process.getuid?.() !== 0) refuse("only root can make one")
  if (free < memoryNeeded)
    refuse(`it takes ${memoryNeeded / MiB} MiB of memory, and ${Math.round(free / MiB)} are available`)
  const self = [process.execPath, ...process.execArgv, import.meta.filename, ...args, "--inside"]
  // the shell is the namespace's init: it reaps what the tests' processes leave
  const init = ["sh", "-c", '"$@"; exit $?', "sh", ...self]
  const child = spawn("unshare", ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", ...init], {
    stdio: ["pipe", "inherit", "inherit"]
  })
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => child.stdin.end())
  child.on("error", (error) => refuse(`unshare cannot be run: ${error.message}`))
  child.on("close", (code) => process.exit(code ?? 1))
}
const refuse = (why: string): never => {
  say(`✘ fresh root: ${why}`)
  results.push(false)
  return finish()
}

/** Runs a program of this machine while the root is made. */
const run = (command: string, argv: ReadonlyArray<string>, input?: string): string => {
  const done = spawnSync(command, argv, { encoding: "utf8", maxBuffer: 64 * MiB, input, cwd: checkout })
  if (done.status === 0) return done.stdout
  throw new Refused(
    `${[command, ...argv].join(" ")}: ${done.error?.message ?? done.stderr.trim().split("\n").slice(-15).join("\n")}`
  )
}

const bind = (from: string, to: string, options = "ro") => {
  mkdirSync(inside(to), { recursive: true })
  run("mount", ["--rbind", from, inside(to)])
  if (options === "ro") run("mount", ["-o", "remount,bind,ro", inside(to)])
}
const kept = (name: string, to: string) => {
  const dir = path.join(cache, name)
  mkdirSync(dir, { recursive: true })
  bind(dir, to, "rw")
}

/** This machine's mirrors of Debian, asked for the suite. */
const mirrors = () => {
  const format = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
  const targets = run("apt-get", ["indextargets", "--format", format, "Created-By: Packages", "Origin: Debian"])
  const lines = targets.split("\n").flatMap((target) => {
    const [uri = "", codename = "", component = ""] = target.split(" ")
    const pocket = /^[a-z]+(-security)?$/.exec(codename)
    if (component !== "main" || pocket === null) return []
    return [`deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${uri} ${suite}${pocket[1] ?? ""} main`]
  })
  if (lines.length === 0) throw new Refused("apt's sources have no mirror of Debian (did `apt-get update` run?)")
  return [...new Set(lines)].join("\n")
}

const makeRoot = () => {
  run("mount", ["-t", "tmpfs", "-o", "size=90%,mode=0755,nr_inodes=0", "fresh-root", root])
  run("mmdebstrap", ["--variant=minbase", "--include=ca-certificates,git", suite, root, "-"], mirrors())
  for (const dir of ["/dev", "/sys"]) bind(dir, dir, "rw")
  run("mount", ["-t", "proc", "proc", inside("/proc")])
  run("mount", ["-t", "tmpfs", "-o", "mode=1777", "shm", inside("/dev/shm")])
  for (const file of ["/etc/hosts", "/etc/resolv.conf"]) cpSync(file, inside(file), { dereference: true })
  if (existsSync("/etc/ssl/certs")) bind("/etc/ssl/certs", "/etc/ssl/certs")

  mkdirSync(inside(home), { recursive: true })
  const npmrc = path.join(os.homedir(), ".npmrc")
  if (existsSync(npmrc)) cpSync(npmrc, inside(path.join(home, ".npmrc")))
  appendFileSync(inside("/etc/passwd"), `somebody:x:${user.uid}:${user.uid}::${user.home}:/bin/sh\n`)
  appendFileSync(inside("/etc/group"), `somebody:x:${user.uid}:\n`)
  mkdirSync(inside(user.home))
  run("chown", [`${user.uid}:${user.uid}`, inside(user.home)])

  mkdirSync(inside("/opt/node/bin"), { recursive: true })
  cpSync(process.execPath, inside("/opt/node/bin/node"))
  const npm = path.join(run("npm", ["root", "--global"]).trim(), "npm")
  bind(npm, "/opt/node/lib/node_modules/npm")
  for (const name of ["npm", "npx"]) {
    symlinkSync(`../lib/node_modules/npm/bin/${name}-cli.js`, inside(`/opt/node/bin/${name}`))
    chmodSync(path.join(npm, "bin", `${name}-cli.js`), 0o755)
  }
  bind(run("rustc", ["--print", "sysroot"]).trim(), "/opt/rust")
  bind(run("go", ["env", "GOROOT"]).trim(), "/opt/go")

  kept("npm", "/var/cache/npm")
  kept("cargo", "/var/cache/cargo")
  kept("go-modules", "/var/cache/go-modules")
  kept(`${suite}/go-build`, "/var/cache/go-build")
  kept(`${suite}/apt`, "/var/cache/apt/archives")
  kept(`${suite}/cargo-target`, "/var/cache/cargo-target")
  kept(`${suite}/cargo-release`, path.join(home, ".cache/machinen/cargo-target"))
  writeFileSync(inside("/etc/apt/apt.conf.d/99keep"), 'APT::Keep-Downloaded-Packages "true";\n')

  // Set-up would make the state directory for its user alone; the last step is another user's, with this store.
  mkdirSync(inside(path.join(home, ".machinen/assets")), { recursive: true })
  if (!buildsAll && existsSync(store)) {
    for (const name of readdirSync(store).filter((entry) => /^(kernel|base-debian)-/.test(entry))) {
      bind(path.join(store, name), path.join(home, ".machinen/assets", name))
    }
  }

  // the commit, then the files as they are here
  run("git", ["clone", "--quiet", "--no-hardlinks", checkout, inside(sources)])
  const files = run("git", ["ls-files", "-z"]).split("\0")
  for (const file of run("git", ["ls-files", "-z"])
    .split("\0")
    .filter((name) => name !== "")) {
    const from = path.join(checkout, file)
    if (existsSync(from)) cpSync(from, inside(path.join(sources, file)))
  }
  return files.length
}

/** What a program in the root finds: nothing of this environment but the way to the network. */
const environment = (): Record<string, string> => {
  const network = Object.entries(process.env).flatMap(([name, value]) =>
    /(^|_)(proxy|ca_certs|ca_bundle|sslcainfo|ssl_cert_file|ssl_cert_dir)$/i.test(name) && value !== undefined
      ? [[name, value]]
      : []
  )
  return {
    ...Object.fromEntries(network),
    HOME: home,
    LANG: "C.UTF-8",
    PATH: "/opt/node/bin:/opt/rust/bin:/opt/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    CARGO_HOME: "/var/cache/cargo",
    // compiled once and not debugged: half the time and a quarter of the space
    CARGO_INCREMENTAL: "0",
    CARGO_PROFILE_DEV_DEBUG: "0",
    CARGO_TARGET_DIR: "/var/cache/cargo-target",
    GOCACHE: "/var/cache/go-build",
    GOMODCACHE: "/var/cache/go-modules",
    GOTOOLCHAIN: "local",
    npm_config_cache: "/var/cache/npm",
    npm_config_prefer_offline: "true"
  }
}

interface Step {
  readonly title: string
  readonly argv: ReadonlyArray<string>
  readonly minutes: number
  /** Nothing after it makes sense when it fails. */
  readonly needed?: boolean
  readonly dir?: string
  /** Somebody who is not root, with the PATH that Debian gives such users. */
  readonly asUser?: boolean
  /** What it must print. */
  readonly prints?: RegExp
}

/** What a guest has in memory only is there in its copies. */
const wholeMachines = `
machinen() { npm run --silent machinen -- "$@"; }
machinen boot --image micro --name source --detach
machinen exec source -- sh -c 'echo one >/dev/shm/note'
machinen fork source --detach --new-name sibling
machinen exec sibling -- sh -c 'cat /dev/shm/note; echo two >/dev/shm/note'
machinen snapshot sibling /tmp/bundle
machinen restore /tmp/bundle --name copy --detach
machinen exec copy -- cat /dev/shm/note
machinen stop copy
machinen stop source
rm -r /tmp/bundle
echo three`

const steps: ReadonlyArray<Step> = [
  { title: "npm ci", argv: ["npm", "ci"], minutes: 5, needed: true },
  {
    title: "npm run demo",
    argv: ["npm", "run", "demo"],
    minutes: 40,
    needed: true,
    prints: /gone: nothing is left behind/
  },
  { title: "doctor", argv: ["npm", "run", "doctor"], minutes: 2, prints: /✔ accelerator/ },
  {
    title: "set-up with tests",
    argv: ["npm", "run", "setup", "--", "--with-tests"],
    minutes: 20,
    needed: true,
    prints: /set-up took/
  },
  { title: "npm run check", argv: ["npm", "run", "check"], minutes: 15 },
  {
    title: "Rust tests",
    argv: ["cargo", "test", "--locked", "--workspace", "--no-fail-fast"],
    minutes: 20,
    prints: /^test result: ok\. [1-9]/m
  },
  { title: "Go tests", argv: ["go", "test", "-v", "./..."], minutes: 10, dir: "gvproxy", prints: /^--- PASS:/m },
  {
    title: "machinen run",
    argv: ["npm", "run", "--silent", "machinen", "--", "run", "--image", "debian", "--", "cat", "/etc/debian_version"],
    minutes: 3,
    prints: /^12\.\d+$/m
  },
  {
    title: "snapshot, restore and fork",
    argv: ["sh", "-ec", wholeMachines],
    minutes: 5,
    prints: /^one$[\s\S]*^two$[\s\S]*^three$/m
  },
  {
    title: "machinen run, as somebody who is not root",
    argv: ["npm", "run", "--silent", "machinen", "--", "run", "--image", "micro", "--", "uname", "-r"],
    minutes: 3,
    asUser: true,
    prints: /^6\.12\.\d+/m
  }
]

/** Runs a step in the root, with its output in a log there of which a failure shows the end. */
const perform = ({ argv, asUser = false, dir = "", minutes, prints, title }: Step) =>
  new Promise<boolean>((resolve) => {
    const began = Date.now()
    say(`… ${title}`)
    const identity = asUser ? [`--userspec=${user.uid}:${user.uid}`] : []
    const own = asUser
      ? {
          HOME: user.home,
          MACHINEN_ASSETS_STORE: path.join(home, ".machinen/assets"),
          npm_config_cache: path.join(user.home, ".npm"),
          PATH: "/opt/node/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
        }
      : {}
    const variables = Object.entries({ ...environment(), ...own }).map(([name, value]) => `${name}=${value}`)
    const inRoot = [
      "env",
      "-i",
      ...variables,
      "sh",
      "-c",
      'cd "$1" && shift && exec "$@"',
      "sh",
      path.join(sources, dir),
      ...argv
    ]
    const child = spawn("chroot", [...identity, root, ...inRoot], { detached: true, stdio: ["ignore", "pipe", "pipe"] })
    let output = ""
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding("utf8")
      stream.on("data", (text: string) => {
        output += text
      })
    }
    const limit = setTimeout(() => {
      output += `\nit took more than ${minutes} minutes\n`
      if (child.pid !== undefined) process.kill(-child.pid, "SIGKILL")
    }, minutes * 60_000)
    child.on("error", (error) => {
      output += error.message
    })
    child.on("close", (code, signal) => {
      clearTimeout(limit)
      const printed = prints === undefined || prints.test(output)
      const ok = code === 0 && printed
      const seconds = ((Date.now() - began) / 1000).toFixed(1)
      if (!ok) {
        const why = code !== 0 ? `ended with ${code ?? signal}` : `did not print ${prints}`
        say(`${output.trimEnd().split("\n").slice(-150).join("\n")}\n✘ ${title}: ${why}, ${seconds} s`)
      } else say(`✔ ${title} (${seconds} s)`)
      resolve(ok)
    })
  })

/** What all the steps' processes have used: a figure that other work on this machine changes little. */
const cpuSeconds = (): number => {
  const fields = readFileSync("/proc/self/stat", "utf8")
    .replace(/^.*\) /, "")
    .split(" ")
  const ticksPerSecond = 100
  return (Number(fields[13]) + Number(fields[14])) / ticksPerSecond
}

const main = async () => {
  process.stdin.on("end", () => process.exit(130)).resume()
  const began = Date.now()
  say(`… a minimal ${suite}`)
  try {
    const files = makeRoot()
    say(`✔ a minimal ${suite}, with ${files} files of this checkout (${((Date.now() - began) / 1000).toFixed(1)} s)`)
    results.push(true)
  } catch (error) {
    if (!(error instanceof Refused)) throw error
    return refuse(error.message)
  }
  for (const [at, step] of steps.entries()) {
    const ok = await perform(step)
    results.push(ok)
    if (!ok && step.needed === true) {
      for (const { title } of steps.slice(at + 1)) {
        say(`✘ ${title}: not tried`)
        results.push(false)
      }
      break
    }
  }
  say(`it took ${((Date.now() - began) / 1000).toFixed(0)} s, ${cpuSeconds().toFixed(0)} s of processors`)
  finish()
}

if (args.includes("--inside")) await main()
else isolate()
