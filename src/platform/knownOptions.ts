/** The options an operation takes, by name. A type that gains an option makes a list without it an error. */
export type OptionNames<Options> = Readonly<Record<keyof Options, true>>

/**
 * The first option that the operation does not know, if there is one: a misspelt option would be ignored silently otherwise. One without a
 * value asks for nothing.
 */
export const unknownOption = <Options extends object>(options: Options, known: OptionNames<Options>) =>
  Object.entries(options).find(([name, value]) => value !== undefined && !Object.hasOwn(known, name))?.[0]

/** What an error says of such an option. */
export const unknownOptionText = (operation: string, name: string, known: object) => ({
  message: `${operation} has no option "${name}"`,
  hint: `its options are: ${Object.keys(known).join(", ")}`
})
