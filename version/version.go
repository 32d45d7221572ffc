// Package version names this build.
package version

// Number is the release, as measured into PCR 0 of every guest.
const Number = "0.1.0"

// Monitor is the version string that the Builder measures for guests of an emulator kind.
func Monitor(emulator string) string { return "Redoubt " + Number + " " + emulator }
