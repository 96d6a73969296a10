import { Options } from "@effect/cli"
import { Effect, Option, Schema } from "effect"
import { ParseError } from "../errors.ts"
import type { BootOptions } from "../machine/BootOptions.ts"
import type { LiveMountOption, MountMode } from "../machine/mountOptions.ts"
import { NetworkMode, type PortForwardOption } from "../machine/Network.ts"
import { parseMapping } from "../machine/TunnelAddress.ts"
import { given } from "../platform/given.ts"
import { variable } from "./argumentBytes.ts"
import { readSecrets, secretOption } from "./secrets.ts"

export const json = Options.boolean("json").pipe(Options.withDescription("print JSON"))

/** Ports of this host that are forwarded to the guest. */
export const publish = Options.text("publish").pipe(
  Options.withAlias("p"),
  Options.repeated,
  Options.withDescription("[ADDRESS:]HOSTPORT:GUESTPORT, on 127.0.0.1 unless an address is given; may be repeated")
)

export const mountLive = Options.text("mount-live").pipe(
  Options.repeated,
  Options.withDescription(
    "HOST:GUEST[:ro|rw][:uid=N][:gid=N]: a directory or file of this host shared with the guest (default rw); may be repeated"
  )
)

/** Options of every verb that boots. */
export const bootOptions = {
  image: Options.text("image").pipe(
    Options.optional,
    Options.withDescription("micro, debian (default), a rootfs tarball or an ext4 image")
  ),
  rootDisk: Options.text("root-disk").pipe(
    Options.optional,
    Options.withDescription("an ext4 image used as the whole root and written to")
  ),
  name: Options.text("name").pipe(Options.withAlias("n"), Options.optional, Options.withDescription("the VM's name")),
  memory: Options.text("memory").pipe(
    Options.withAlias("m"),
    Options.optional,
    Options.withDescription("MiB of memory, or auto (default 512)")
  ),
  vcpus: Options.text("vcpus").pipe(Options.optional, Options.withDescription("virtual CPUs (default 1)")),
  disk: Options.text("disk").pipe(
    Options.optional,
    Options.withDescription("size of the writable layer: bytes, or with K, M, G (default 2G)")
  ),
  network: Options.text("network").pipe(
    Options.optional,
    Options.withDescription("nat (default): the guest reaches what this host reaches; none: it has no network")
  ),
  publish,
  env: Options.text("env").pipe(
    Options.withAlias("e"),
    Options.repeated,
    Options.withDescription("KEY=VALUE, or KEY to pass on the caller's; may be repeated")
  ),
  volume: Options.text("volume").pipe(
    Options.withAlias("v"),
    Options.repeated,
    Options.withDescription("HOST:/mnt/NAME: a copy of a host directory, which itself is never changed")
  ),
  mountLive,
  secret: secretOption,
  workdir: Options.text("workdir").pipe(
    Options.withAlias("w"),
    Options.optional,
    Options.withDescription("working directory in the guest")
  ),
  user: Options.text("user").pipe(
    Options.withAlias("u"),
    Options.optional,
    Options.withDescription("whom commands run as: user[:group], names or numbers (default the image's, else root)")
  )
}

export interface BootFlags {
  readonly image: Option.Option<string>
  readonly rootDisk: Option.Option<string>
  readonly name: Option.Option<string>
  readonly memory: Option.Option<string>
  readonly vcpus: Option.Option<string>
  readonly disk: Option.Option<string>
  readonly network: Option.Option<string>
  readonly publish: ReadonlyArray<string>
  readonly env: ReadonlyArray<string>
  readonly volume: ReadonlyArray<string>
  readonly mountLive: ReadonlyArray<string>
  readonly secret: ReadonlyArray<string>
  readonly workdir: Option.Option<string>
  readonly user: Option.Option<string>
}

const malformed = (flag: string, value: string, expected: string) =>
  new ParseError({
    code: "PARSE_FLAG_MALFORMED",
    message: `--${flag} ${JSON.stringify(value)} is not ${expected}`,
    hint: "`--help` shows what the command takes"
  })

/** Parses a whole number. The boot checks the range, with a message of its own. */
export const wholeNumber = (flag: string, value: string) =>
  /^-?[0-9]+(e[0-9]+)?$/i.test(value) ? Effect.succeed(Number(value)) : malformed(flag, value, "a whole number")

/** Parses `[ADDRESS:]HOSTPORT:GUESTPORT`. The boot checks the address. */
export const portForward = (values: ReadonlyArray<string>) =>
  Effect.forEach(values, (value) => {
    const refused = (why: string) =>
      new ParseError({
        code: "PARSE_PORT_INVALID",
        message: `--publish ${why}`,
        hint: "8080:80, 0.0.0.0:8080:80, or [::1]:8080:80; `machinen forward` takes any free port, and a unix socket of the guest"
      })
    return parseMapping(value).pipe(
      Effect.mapError(({ message }) => refused(message)),
      Effect.flatMap(({ guest, hostAddress, hostPort }) =>
        hostPort === undefined || !("port" in guest)
          ? refused(
              "port" in guest
                ? `${JSON.stringify(value)} names no port of this host`
                : `${JSON.stringify(value)} is not [ADDRESS:]HOSTPORT:GUESTPORT`
            )
          : Effect.succeed<PortForwardOption>({
              ...given({ hostAddr: hostAddress }),
              hostPort,
              guestPort: guest.port
            })
      )
    )
  })

export const network = (value: string): Effect.Effect<NetworkMode, ParseError> =>
  Schema.is(NetworkMode)(value) ? Effect.succeed(value) : malformed("network", value, "nat or none")

const units: Readonly<Record<string, number>> = { "": 1, k: 1024, m: 1024 ** 2, g: 1024 ** 3, t: 1024 ** 4 }

export const size = (flag: string, value: string) => {
  const match = /^([0-9]+)([kmgt]?)(i?b)?$/i.exec(value)
  return match === null
    ? malformed(flag, value, "a size like 512M or 8G")
    : Effect.succeed(Number(match[1]) * (units[(match[2] ?? "").toLowerCase()] ?? 1))
}

/** Parses a time limit: seconds, or a number with ms, s, m or h. Returns milliseconds. */
export const durationMs = (flag: string, value: string) => {
  const match = /^([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?$/.exec(value)
  const factor = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[match?.[2] ?? "s"] ?? 1000
  return match === null ? malformed(flag, value, "a time like 30s or 5m") : Effect.succeed(Number(match[1]) * factor)
}

export const environment = (pairs: ReadonlyArray<string>) =>
  Effect.forEach(pairs, (pair) => {
    const at = pair.indexOf("=")
    if (at === 0) return malformed("env", pair, "KEY=VALUE")
    if (at > 0) return Effect.succeed([pair.slice(0, at), pair.slice(at + 1)] as const)
    const inherited = variable(pair)
    if (inherited === "absent") return malformed("env", pair, "KEY=VALUE, nor set in this environment")
    return inherited === "not text"
      ? malformed("env", pair, "a variable whose value is UTF-8")
      : Effect.succeed([pair, inherited.value] as const)
  }).pipe(Effect.map((entries) => Object.fromEntries(entries)))

/** Divides `HOST:/GUEST`. A host path may hold colons: the last colon before a slash divides. */
const hostAndGuest = (place: string) => {
  const at = place.lastIndexOf(":/")
  // a second colon there begins something that is not valid
  return at > 0 && !place.includes(":", at + 1)
    ? Option.some({ host: place.slice(0, at), guest: place.slice(at + 1) })
    : Option.none()
}

const volume = Effect.fnUntraced(function* ([value, another]: ReadonlyArray<string>) {
  if (another !== undefined) {
    return yield* new ParseError({
      code: "PARSE_FLAG_DUPLICATE",
      message: "--volume was given more than once",
      hint: "a VM takes one copy of a directory: give the directory above several of them"
    })
  }
  if (value === undefined) return {}
  const mount = hostAndGuest(value)
  return Option.isSome(mount) ? { mount: mount.value } : yield* malformed("volume", value, "HOST:/mnt/NAME")
})

export const liveMounts = (values: ReadonlyArray<string>) => Effect.forEach(values, liveMount)

/** The last thing that is said of a live mount: its mode, user or group. */
const suffix = /^(.*):(?:(ro|rw)|(uid|gid)=([0-9]+))$/s

/** Parses `HOST:/GUEST`, mode, user and group, each at most once. The boot checks the paths and the numbers. */
const liveMount = (value: string) => {
  const refused = malformed(
    "mount-live",
    value,
    "HOST:GUEST[:ro|rw][:uid=N][:gid=N], with an absolute path in the guest"
  )
  const said = new Map<string, string>()
  let place = value
  for (let last = suffix.exec(place); last !== null; last = suffix.exec(place)) {
    const [, before = "", mode, owner = "mode", id = mode ?? ""] = last
    if (said.has(owner)) return refused
    said.set(owner, id)
    place = before
  }
  const mount = hostAndGuest(place)
  if (Option.isNone(mount)) return refused
  const [mode, uid, gid] = [said.get("mode"), said.get("uid"), said.get("gid")]
  const option: LiveMountOption = {
    ...mount.value,
    ...given({ mode: mode === "ro" || mode === "rw" ? (mode as MountMode) : undefined }),
    ...given({ uid: uid === undefined ? undefined : Number(uid), gid: gid === undefined ? undefined : Number(gid) })
  }
  return Effect.succeed(option)
}

/** Leaves out the options that were not given. */
export const whenGiven = <A extends Readonly<Record<string, Option.Option<unknown>>>>(options: A) => {
  const given = Object.entries(options).flatMap(([key, value]) => (Option.isSome(value) ? [[key, value.value]] : []))
  return Object.fromEntries(given) as { readonly [K in keyof A]?: A[K] extends Option.Option<infer B> ? B : never }
}

export const memory = (value: string): Effect.Effect<number | "auto", ParseError> =>
  value === "auto" ? Effect.succeed("auto") : wholeNumber("memory", value)

/** Turns the flags that decide the machine into boot options. */
export const toMachineOptions = (flags: Pick<BootFlags, "image" | "memory" | "vcpus" | "disk" | "network">) =>
  Effect.all({
    image: Effect.succeed(flags.image),
    network: Effect.transposeMapOption(flags.network, network),
    memoryMib: Effect.transposeMapOption(flags.memory, memory),
    vcpus: Effect.transposeMapOption(flags.vcpus, (value) => wholeNumber("vcpus", value)),
    rootDiskSizeBytes: Effect.transposeMapOption(flags.disk, (value) => size("disk", value))
  }).pipe(Effect.map((given) => whenGiven(given)))

/** Turns flags into boot options. Checks only the syntax of each. */
export const toBootOptions = Effect.fnUntraced(function* (flags: BootFlags, command: ReadonlyArray<string>) {
  const { name, rootDisk, user, workdir: cwd } = flags
  const options: BootOptions = {
    ...(yield* toMachineOptions(flags)),
    ...whenGiven({ cwd, name, rootDisk, user }),
    ...(command.length === 0 ? {} : { command }),
    portForward: yield* portForward(flags.publish),
    ...(yield* volume(flags.volume)),
    liveMounts: yield* liveMounts(flags.mountLive),
    env: yield* environment(flags.env),
    secrets: yield* readSecrets(flags.secret)
  }
  return options
})
