package manager

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"redoubt.dev/redoubt/vtpm/keys"
)

// A guest's directory has its name only while it is whole. What is being made or removed has another one, and goes when a
// manager opens the state.
const (
	makingSuffix  = ".new"
	removedSuffix = ".removed"
)

// leftover says whose directory a killed manager was making or removing when it had this name.
func leftover(name string) (guest string, ok bool) {
	for _, suffix := range []string{makingSuffix, removedSuffix} {
		if of, ok := strings.CutSuffix(name, suffix); ok && checkGuest(of) == nil {
			return of, true
		}
	}
	return "", false
}

// discard removes a guest's directory, and what is left of one that was being removed.
func (m *Manager) discard(guest string) error {
	dir := m.guestDir(guest)
	gone := dir + removedSuffix
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := os.Rename(dir, gone); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(gone), keys.SyncDir(dir))
}

// newMarker lies in the directory of a guest whose record is not yet written. No command has run
// in such a vTPM, so a crash at that point costs nothing but the directory.
const newMarker = "new"

// makeGuestDir makes the directory of a new guest.
func (m *Manager) makeGuestDir(guest string) error {
	made := m.guestDir(guest)
	dir := made + makingSuffix
	if err := os.RemoveAll(dir); err != nil { // of one that came to nothing
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join(dir, newMarker), nil, 0o600)
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, tpmDir), 0o770)
	}
	if err == nil {
		// Where the engine has a user of its own, the two of them share the group.
		err = os.Chmod(filepath.Join(dir, tpmDir), 0o770) // whatever the umask
	}
	if err == nil {
		err = os.Rename(dir, made)
	}
	if err != nil {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// unfinished says that a crash came before a new guest's record was written.
func (m *Manager) unfinished(guest string) bool {
	_, err := os.Lstat(filepath.Join(m.guestDir(guest), recordFile))
	if !errors.Is(err, os.ErrNotExist) {
		return false
	}
	_, err = os.Lstat(filepath.Join(m.guestDir(guest), newMarker))
	return err == nil
}
