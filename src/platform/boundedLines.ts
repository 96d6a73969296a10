import { Effect, Stream } from "effect"

/** Splits a byte stream into lines. Fails with `tooLong` when a line has more than `max` characters, for a peer may never end its line. */
export const boundedLines =
  <E2>(max: number, tooLong: () => E2) =>
  <E, R>(bytes: Stream.Stream<Uint8Array, E, R>): Stream.Stream<string, E | E2, R> =>
    Stream.suspend(() => {
      const decoder = new TextDecoder()
      let rest = ""
      const take = (piece: Uint8Array) =>
        Effect.suspend(() => {
          const lines = `${rest}${decoder.decode(piece, { stream: true })}`.split("\n")
          rest = lines.pop() ?? ""
          const isTooLong = rest.length > max || lines.some((line) => line.length > max)
          return isTooLong ? Effect.fail(tooLong()) : Effect.succeed(lines)
        })
      return Stream.concat(
        Stream.mapConcatEffect(bytes, take),
        Stream.suspend(() => (rest === "" ? Stream.empty : Stream.make(rest)))
      )
    })
