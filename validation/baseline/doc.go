// Package baseline says what the files of a guest's disk should be, and how they deviate: rules for what is looked at, a
// signed file of what was found when all was well, and the comparison of the two.
//
// It is pure: nothing is opened, and there is no clock. What it is given may be an attacker's: a baseline file of any bytes,
// names and attributes of a hostile guest. Sizes and counts are bounded, errors name the line or the byte, and what cannot
// be decided is a deviation.
//
// A baseline is made by [Write] of what a scan read, signed by [Sign], and read through [Verify]. [Compare] finds what
// deviates, [CompareTouched] goes on from there, [Confirm] holds it against a second snapshot, and [Accept] makes the next
// baseline.
package baseline
