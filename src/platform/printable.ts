/**
 * Makes text from a guest safe to print: control characters, and characters that reorder or hide others, become escapes. So the text can
 * neither steer the terminal nor make a line look like another one. With `lines` newlines and tabs stay.
 */
export const printable = (text: string, { lines = false }: { readonly lines?: boolean } = {}): string =>
  text.replace(/\p{C}|[\u2028\u2029]/gu, (character) =>
    lines && (character === "\n" || character === "\t") ? character : escapeOf(character)
  )

const named: Readonly<Record<string, string>> = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e" }

const escapeOf = (character: string): string => {
  const code = character.codePointAt(0) ?? 0
  const known = named[character]
  if (known !== undefined) return known
  return code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`
}
